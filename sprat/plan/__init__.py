"""What will it cost? Counts, memory, time and money of a run before it starts: arithmetic on configs, without torch."""
