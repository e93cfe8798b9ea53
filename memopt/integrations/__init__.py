"""Other people's loops, one file each; each imports its package when it is used."""
