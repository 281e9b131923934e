"""What failed for good: kept, listed, and sent again."""
