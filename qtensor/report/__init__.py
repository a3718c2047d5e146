"""What a load was: its numbers as data and text, memory, the page, the picture, and progress while it runs."""
