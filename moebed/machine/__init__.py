"""What the machine beneath is and keeps: files, the terminal, types of numbers, memory, signals."""
