"""Checkpoint folders that are damaged at random: reading each ends in an error of ours, or in what the files really hold."""
