"""The rows of the table of architectures, one file for families that are alike."""
