"""Watchdog, preemption, bad-step guard and goodput accounting."""
