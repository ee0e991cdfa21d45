"""What an architecture is: the switches of the decoder, the table of families, and their config files."""
