"""What pages, pictures, tables, benchmarks and examples say, and what is said of other tools and whole models."""
