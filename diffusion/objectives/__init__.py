"""Training objectives: what a network is asked to predict, at which times and with which weight; one a file."""
