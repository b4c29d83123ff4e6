"""What every rank did and when: recorded, put on one clock, and shown."""
