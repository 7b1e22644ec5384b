"""Reports of a run folder: tables for the console, one HTML page that works offline."""
