"""How good is it, and how sure are we? Scores with intervals (without torch), tasks, bits per byte."""
