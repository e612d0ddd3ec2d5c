"""What ``scripts/demo`` is made of: the stories, the stage they play on, and the screen they are shown on."""
