"""What state will cost before it exists: priced, fitted to a budget, balanced over ranks."""
