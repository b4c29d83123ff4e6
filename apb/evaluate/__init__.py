"""What a method does to answers: tasks, generated and given, their scores, paired comparisons."""
