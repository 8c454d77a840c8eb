"""The command line: commands, their arguments, and the list of what is installed."""
