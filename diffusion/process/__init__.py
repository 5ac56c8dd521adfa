"""The forward process: schedules, parameterizations, loss weightings and time sampling."""
