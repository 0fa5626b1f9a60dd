"""A web page on this machine that shows what an exported model says about a film."""
