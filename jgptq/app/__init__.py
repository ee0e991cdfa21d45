"""What a person runs and looks at: the command line, the demonstration, tables."""
