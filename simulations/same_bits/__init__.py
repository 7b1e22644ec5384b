"""The same small runs on two versions of the code, and a comparison of what they leave, to the bit."""
