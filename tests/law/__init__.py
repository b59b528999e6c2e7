"""What holds for all: maps, rules, families, programs, and the package as a whole."""
