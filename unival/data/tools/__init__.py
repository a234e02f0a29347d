"""Commands on data before training: check, shard, reencode, stats (`unival data ...`)."""
