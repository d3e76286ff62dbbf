"""What the records say: tables, comparisons, pictures."""
