"""The train state, the train step and the loop around them."""
