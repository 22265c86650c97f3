//! Builds the parts, starts them in order, returns the bound addresses.
