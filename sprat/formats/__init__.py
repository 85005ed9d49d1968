"""How does a file become our model, and back? Import the parts by their module: some need no torch."""
