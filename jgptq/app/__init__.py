"""The command line, the demonstration, and tables for a terminal."""
