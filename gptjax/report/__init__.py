"""What evaluation, studies and checks of size share when they tell what they found."""
