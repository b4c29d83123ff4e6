"""What a method does to answers: generated and given tasks, their scores, and paired comparisons."""
