"""What a training will need and how long its steps may take, from its compiled program, before any chip is paid for."""
