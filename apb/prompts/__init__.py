"""What a request is made of: a document read or generated, and the prompt around it."""
