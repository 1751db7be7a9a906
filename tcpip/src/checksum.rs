//! The Internet checksum (RFC 1071), for all protocols and both families: one loop that takes eight bytes at a time.
//!
//! What always holds: sums are over bytes as they lie in memory, which RFC 1071 section 2(B) allows, and only a finished
//! one is put into the order of its numbers.

/// Adds bytes to a sum. Only the last piece of what is summed may have an odd length.
pub(crate) fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    for word in words.iter().chain([&last]) {
        let (next, carry) = sum.overflowing_add(u64::from_ne_bytes(*word));
        sum = next + u64::from(carry);
    }
    sum
}

/// The 16 bits that a sum comes to, without the final complement.
pub(crate) fn finish(sum: u64) -> u16 {
    let mut sum = sum;
    // At most 33, then 18, then 17 bits are left, then 16.
    sum = (sum >> 32) + (sum & 0xffff_ffff);
    for _ in 0..3 {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::from_be(sum as u16)
}

/// The sum of bytes, without the final complement: all ones for a message whose checksum is right.
pub(crate) fn of(bytes: &[u8]) -> u16 {
    finish(add(0, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_that_of_rfc_1071(bytes in proptest::collection::vec(any::<u8>(), 0..200),
                                  ones in 0usize..40) {
            let bytes = [vec![0xff; ones * 2], bytes].concat();
            let mut plain = 0u32;
            for pair in bytes.chunks(2) {
                plain += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
                plain = (plain >> 16) + (plain & 0xffff);
            }
            prop_assert_eq!(u32::from(of(&bytes)), plain);
            let cut = bytes.len() / 4 * 2;
            prop_assert_eq!(finish(add(add(0, &bytes[..cut]), &bytes[cut..])), of(&bytes));
        }
    }
}
