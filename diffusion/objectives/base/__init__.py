"""Code that several training objectives share."""
