"""What a step costs, what a fit makes of it, and how long recall takes."""
