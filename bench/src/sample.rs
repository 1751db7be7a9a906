//! Series of measurements, and what is said of them.

/// Measured values of one thing.
#[derive(Clone, Debug, Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Adds a value.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The value that a given part of the others does not exceed: 0.5 is the median. Not a number without values.
    #[must_use]
    pub fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let place = (sorted.len().saturating_sub(1) as f64 * part).round();
        sorted.get(place as usize).copied().unwrap_or(f64::NAN)
    }

    /// The median.
    #[must_use]
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Median and the bounds of the middle half, with a unit.
    #[must_use]
    pub fn describe(&self, unit: &str) -> String {
        format!(
            "{:.1} {unit} (middle half {:.1} to {:.1}, {} values)",
            self.median(),
            self.quantile(0.25),
            self.quantile(0.75),
            self.0.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Sample;

    #[test]
    fn quantiles() {
        let mut sample = Sample::default();
        assert!(sample.median().is_nan());
        for value in [5.0, 1.0, 4.0, 2.0, 3.0] {
            sample.push(value);
        }
        assert_eq!(sample.median(), 3.0);
        assert_eq!(sample.quantile(0.0), 1.0);
        assert_eq!(sample.quantile(1.0), 5.0);
    }
}
