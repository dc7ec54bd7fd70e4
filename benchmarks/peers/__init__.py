"""What a user would pick instead of this library, and the processes that hold the contestants of a benchmark."""
