//! Builds the text of a scrape from plain numbers; the one place that knows the prometheus crate.

use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};
use prometheus::{Encoder as _, TextEncoder};

/// Labels of a sample: names and values.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// Counts of a histogram: per upper bound (seconds), not cumulative; what is above the last bound
/// counts in `count` alone.
#[derive(Debug, Clone, Default)]
pub struct Buckets {
    /// (upper bound, samples in this bucket).
    pub buckets: Vec<(f64, u64)>,
    /// All samples.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
}

/// A scrape in the making. Samples of one family must be added in one go.
#[derive(Debug, Default)]
pub struct Families {
    families: Vec<MetricFamily>,
}

impl Families {
    /// A gauge without labels.
    pub fn gauge(&mut self, name: &str, help: &str, labels: Labels<'_>, value: f64) {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        let mut metric = with_labels(labels);
        metric.set_gauge(gauge);
        self.add(name, help, MetricType::GAUGE, metric);
    }

    /// A counter.
    pub fn counter(&mut self, name: &str, help: &str, labels: Labels<'_>, value: f64) {
        let mut counter = Counter::default();
        counter.set_value(value);
        let mut metric = with_labels(labels);
        metric.set_counter(counter);
        self.add(name, help, MetricType::COUNTER, metric);
    }

    /// A histogram.
    pub fn histogram(&mut self, name: &str, help: &str, labels: Labels<'_>, samples: &Buckets) {
        let mut cumulative = 0;
        let buckets = samples.buckets.iter().map(|&(bound, count)| {
            cumulative += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(cumulative);
            bucket
        });
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(samples.count);
        histogram.set_sample_sum(samples.sum);
        let mut metric = with_labels(labels);
        metric.set_histogram(histogram);
        self.add(name, help, MetricType::HISTOGRAM, metric);
    }

    fn add(&mut self, name: &str, help: &str, kind: MetricType, metric: Metric) {
        let name = format!("afterimage_{name}");
        if let Some(family) = self.families.iter_mut().find(|f| f.name() == name) {
            family.mut_metric().push(metric);
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name);
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.mut_metric().push(metric);
        self.families.push(family);
    }

    /// The text format.
    ///
    /// # Errors
    /// When a family breaks the format's rules.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.families, &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

fn with_labels(labels: Labels<'_>) -> Metric {
    let pair = |&(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.to_owned());
        pair.set_value(value.to_owned());
        pair
    };
    Metric::from_label(labels.iter().map(pair).collect())
}
