"""Every setting, its type, its range and its help: the one page that recipes, the command line and `--help` read."""
