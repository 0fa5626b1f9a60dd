"""Where networks come from: torchvision, timm, or a function of one's own."""
