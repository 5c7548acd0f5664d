"""Who writes captions, what they are asked, and how their answers are checked."""
