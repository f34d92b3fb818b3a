"""What qtale shows: folders and runs as text tables and JSON."""
