"""What a CPU's time goes to beside products of matrices: memory, passes over maps, transforms."""
