"""The playground: a Gradio page on which a network's budget is turned and its pictures are looked at (`elit play`)."""
