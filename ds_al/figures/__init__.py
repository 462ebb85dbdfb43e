"""What tables, charts and pages are made of."""
