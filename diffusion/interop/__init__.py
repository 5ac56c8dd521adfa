"""Reading and writing weights in the formats of other libraries. None of them is imported."""
