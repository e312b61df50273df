"""What was found: rows on disk, intervals, pictures."""
