"""What a run will take, before it is launched: operations, bytes, time, memory and cost."""
