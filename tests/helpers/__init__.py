"""What tests of several rooms use. No test imports another test; what two of them need stands here."""
