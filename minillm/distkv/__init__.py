"""The KV cache of one sequence in several places: partial attention where the blocks lie, and its merge."""
