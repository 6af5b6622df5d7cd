"""What runs a method: `local` in one process. Methods know nothing of engines."""
