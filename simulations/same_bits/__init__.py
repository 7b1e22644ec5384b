"""Does the same small runs on two versions of the code, and compares their files to the bit."""
