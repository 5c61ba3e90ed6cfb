/* One optimizer step for many small blocks, and their eigen-decomposition.

   Blocks are worked on LANES at a time, one in each vector lane ("struct of arrays"): the k-th entry of all of them
   lies together. A block V is reduced to tridiagonal form T = H' V H by Householder reflections; implicit QL with
   Wilkinson's shift diagonalises T. The matrix function f(V) m needs no eigenvectors: the rotations are applied to H' m
   as they are found, the result is scaled by f(eigenvalues), and rotations and reflections are undone in reverse: it
   takes O(4/3 n^3) for the reduction and O(n^2) for the rest. All of it is done in double
   precision, whatever the storage.

   A lane that has converged gets identity rotations, so that a block's result does not depend on its neighbours.

   The file includes itself once for each storage type and lane count. */

#ifndef LANES

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { SOLVE = 0, DIAGONAL = 1, REFRESH = 2, TRACKED = 3, ACCUMULATE = 4, FLAT = 5 };

typedef struct {
    const void *grad;     /* one gradient a parameter, in the parameter's layout */
    void *mean;           /* first moment, in the parameter's layout; null: the gradient itself */
    void *moments;        /* second moments [tiles, n (n + 1) / 2, width], lower triangle by rows */
    void *param;          /* parameter, updated in place; or the place for the update, see `subtract` */
    void *basis;          /* eigenvectors [tiles, n * n, width] (component, vector); null unless tracked */
    void *spectrum;       /* eigenvalues [tiles, n, width]; null unless tracked */
    const int64_t *index; /* coordinates [blocks, n] of an explicit partition, -1 pads; null: lines below */
    int64_t *failed;      /* counts blocks whose iteration did not converge */
    int64_t width, n, chunks, length, line_stride, stride; /* block j: part j % chunks of line j / chunks */
    int64_t first, last;  /* blocks of this call; `first` is a multiple of 16. width: min(16, blocks) */
    int64_t mode, double_storage, subtract, interval, phase;
    double sign, coupled_decay, shrink; /* g = sign * grad + coupled_decay * p;  p *= shrink */
    double mean_keep, mean_add, moment_keep, moment_add;
    double jitter, floor, rate, root_scale, damping, lower, upper;
} Task;

#define MAX_SWEEPS 40
#define TINY 1e-290
/* An odd distance between rows: a power of two would put a column into one set of the cache. */
#define LEADING(n) ((n) | 1)

#define LANES 16
#define STORE float
#define NAME(x) x##_f16
#include "kernel.c"
#undef LANES
#undef STORE
#undef NAME
#define LANES 16
#define STORE double
#define NAME(x) x##_d16
#include "kernel.c"
#undef LANES
#undef STORE
#undef NAME
#define LANES 8
#define STORE float
#define NAME(x) x##_f8
#include "kernel.c"
#undef LANES
#undef STORE
#undef NAME
#define LANES 8
#define STORE double
#define NAME(x) x##_d8
#include "kernel.c"
#undef LANES
#undef STORE
#undef NAME

/* Whether an element's magnitude exceeds the limit, or is no number. */
int64_t bd_scan(const void **data, const int64_t *sizes, const int64_t *doubles, const double *limits, int64_t count) {
    for (int64_t k = 0; k < count; k++) {
        int bad = 0;
        if (doubles[k]) {
            const double *x = data[k], limit = limits[k];
            for (int64_t i = 0; i < sizes[k]; i++) bad |= !(fabs(x[i]) <= limit);
        } else {
            const float *x = data[k], limit = (float)limits[k];
            for (int64_t i = 0; i < sizes[k]; i++) bad |= !(fabsf(x[i]) <= limit);
        }
        if (bad) return k;
    }
    return -1;
}

/* Elements of a tensor without blocks that one tile holds. */
#define FLAT_TILE 1024

static int64_t tiles_of(const Task *task) {
    int64_t size = task->mode == FLAT ? FLAT_TILE : 16;
    return (task->last - task->first + size - 1) / size;
}

/* Doubles of scratch memory that blocks of size n need. */
int64_t bd_workspace(int64_t n) {
    int64_t lanes = n <= 32 ? 16 : 8;
    return lanes * (2 * n * n + 17 * n + n * (n - 1) * MAX_SWEEPS) + n * n * MAX_SWEEPS / 4 + 64;
}

/* Work through `count` tasks; several threads may do so at once, sharing `next`, which starts at 0. Returns nonzero if
   memory is short. */
int64_t bd_step(const Task *tasks, int64_t count, int64_t *next) {
    int64_t size = 0, total = 0;
    for (int64_t k = 0; k < count; k++) {
        int64_t wanted = bd_workspace(tasks[k].n);
        if (wanted > size) size = wanted;
        total += tiles_of(&tasks[k]);
    }
    double *work = malloc(sizeof(double) * (size_t)size + 64);
    if (!work) return 1;
    double *aligned = (double *)(((uintptr_t)work + 63) & ~(uintptr_t)63);
    int64_t task = 0, before = 0;
    for (;;) {
        int64_t tile = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (tile >= total) break;
        while (tile >= before + tiles_of(&tasks[task])) before += tiles_of(&tasks[task++]);
        const Task *t = &tasks[task];
        if (t->mode == FLAT) {
            int64_t start = FLAT_TILE * (tile - before), stop = start + FLAT_TILE;
            if (stop > t->last) stop = t->last;
            t->double_storage ? flat_d16(t, start, stop) : flat_f16(t, start, stop);
            continue;
        }
        int64_t start = t->first + 16 * (tile - before), stop = start + 16 < t->last ? start + 16 : t->last;
        int64_t lanes = t->n <= 32 ? 16 : 8;
        for (int64_t j = start; j < stop; j += lanes) {
            int64_t valid = stop - j < lanes ? stop - j : lanes;
            if (t->double_storage)
                lanes == 16 ? tile_d16(t, j, valid, aligned) : tile_d8(t, j, valid, aligned);
            else
                lanes == 16 ? tile_f16(t, j, valid, aligned) : tile_f8(t, j, valid, aligned);
        }
    }
    free(work);
    return 0;
}

int64_t bd_task_size(void) { return (int64_t)sizeof(Task); }

#else /* the body, for one storage type and lane count */

#define EACH _Pragma("omp simd") for (int v = 0; v < LANES; v++)
#define AT(a, i) ((a) + (i) * LANES)
#define ROW(base, rows, row) ((base) + (tile * (rows) + (row)) * width + lane)

/* Reduce the lower triangle A to tridiagonal d, e; the reflectors stay below A's diagonal, their factors in B. */
static void NAME(reduce)(int64_t n, double *restrict A, double *restrict B, double *restrict d, double *restrict e,
                         double *restrict w) {
    const int64_t ld = LEADING(n);
    for (int64_t k = 0; k + 2 < n; k++) {
        double rest[LANES], half[LANES];
        double *x0 = AT(A, (k + 1) * ld + k), *beta = AT(B, k), *ek = AT(e, k);
        EACH rest[v] = 0;
        for (int64_t i = k + 2; i < n; i++) {
            double *x = AT(A, i * ld + k);
            EACH rest[v] += x[v] * x[v];
        }
        EACH {
            double norm = sqrt(x0[v] * x0[v] + rest[v]), alpha = x0[v] > 0 ? -norm : norm, head = x0[v] - alpha;
            int turned = rest[v] > TINY;
            beta[v] = turned ? 2 / (head * head + rest[v]) : 0;
            ek[v] = turned ? alpha : x0[v];
            x0[v] = turned ? head : x0[v];
        }
        for (int64_t i = k + 1; i < n; i++) {
            double *wi = AT(w, i);
            EACH wi[v] = 0;
        }
        for (int64_t i = k + 1; i < n; i++) {
            double *wi = AT(w, i), *vi = AT(A, i * ld + k), *row = AT(A, i * ld);
            double sum[LANES], xi[LANES];
            EACH {
                xi[v] = vi[v];
                sum[v] = AT(row, i)[v] * xi[v];
            }
            for (int64_t j = k + 1; j < i; j++) {
                double *a = AT(row, j), *vj = AT(A, j * ld + k), *wj = AT(w, j);
                EACH {
                    sum[v] += a[v] * vj[v];
                    wj[v] += a[v] * xi[v];
                }
            }
            EACH wi[v] += sum[v];
        }
        EACH half[v] = 0;
        for (int64_t i = k + 1; i < n; i++) {
            double *wi = AT(w, i), *vi = AT(A, i * ld + k);
            EACH half[v] += wi[v] * vi[v];
        }
        EACH half[v] *= 0.5 * beta[v] * beta[v];
        for (int64_t i = k + 1; i < n; i++) {
            double *wi = AT(w, i), *vi = AT(A, i * ld + k);
            EACH wi[v] = beta[v] * wi[v] - half[v] * vi[v];
        }
        for (int64_t i = k + 1; i < n; i++) {
            double *vi = AT(A, i * ld + k), *wi = AT(w, i), *row = AT(A, i * ld);
            double xi[LANES], yi[LANES];
            EACH {
                xi[v] = vi[v];
                yi[v] = wi[v];
            }
            for (int64_t j = k + 1; j <= i; j++) {
                double *a = AT(row, j), *vj = AT(A, j * ld + k), *wj = AT(w, j);
                EACH a[v] -= xi[v] * wj[v] + yi[v] * vj[v];
            }
        }
    }
    for (int64_t i = 0; i < n; i++) {
        double *di = AT(d, i), *a = AT(A, i * ld + i), *ei = AT(e, i);
        EACH di[v] = a[v];
        if (i == n - 1) {
            EACH ei[v] = 0;
        } else if (i == n - 2) {
            double *last = AT(A, (i + 1) * ld + i);
            EACH ei[v] = last[v];
        }
    }
}

/* Reflect the vector y by all of A's reflectors, in order or in reverse. */
static void NAME(reflect)(int64_t n, const double *restrict A, const double *restrict B, double *restrict y,
                          int reverse) {
    const int64_t ld = LEADING(n);
    for (int64_t step = 0; step + 2 < n; step++) {
        int64_t k = reverse ? n - 3 - step : step;
        double dot[LANES];
        EACH dot[v] = 0;
        for (int64_t i = k + 1; i < n; i++) {
            const double *x = AT(A, i * ld + k), *yi = AT(y, i);
            EACH dot[v] += x[v] * yi[v];
        }
        const double *beta = AT(B, k);
        EACH dot[v] *= beta[v];
        for (int64_t i = k + 1; i < n; i++) {
            const double *x = AT(A, i * ld + k);
            double *yi = AT(y, i);
            EACH yi[v] -= dot[v] * x[v];
        }
    }
}

/* Diagonalise d, e in place by implicit QL. `turns` receives cosine and sine of every rotation and `where` its lower
   coordinate; returns their number, and in `lost` the lanes that did not converge. */
static int64_t NAME(diagonalise)(int64_t n, double *restrict d, double *restrict e, double tolerance,
                                 double *restrict turns, int32_t *restrict where, double *restrict lost) {
    int64_t count = 0;
    EACH lost[v] = 0;
    for (int64_t l = 0; l + 1 < n; l++) {
        for (int sweep = 0; sweep <= MAX_SWEEPS; sweep++) {
            double m[LANES], g[LANES], s[LANES], c[LANES], p[LANES], far[LANES];
            EACH {
                m[v] = (double)(n - 1);
                far[v] = AT(d, n - 1)[v];
            }
            for (int64_t i = n - 2; i >= l; i--) {
                double *di = AT(d, i), *ei = AT(e, i), position = (double)i;
                EACH {
                    int small = fabs(ei[v]) <= tolerance;
                    m[v] = small ? position : m[v];
                    far[v] = small ? di[v] : far[v];
                }
            }
            double most = 0, first = (double)l;
            EACH most = m[v] > most ? m[v] : most;
            if (most <= first) break;
            if (sweep == MAX_SWEEPS) {
                EACH lost[v] = m[v] > first ? 1 : lost[v];
                break;
            }
            double *dl = AT(d, l), *el = AT(e, l), *dn = AT(d, l + 1);
            EACH {
                double q = (dn[v] - dl[v]) / (2 * el[v]), r = sqrt(q * q + 1);
                g[v] = far[v] - dl[v] + el[v] / (q + (q >= 0 ? r : -r));
                s[v] = 1;
                c[v] = 1;
                p[v] = 0;
            }
            for (int64_t i = (int64_t)most - 1; i >= l; i--) {
                double *turn = turns + 2 * LANES * count;
                where[count++] = (int32_t)i;
                double *di = AT(d, i), *dj = AT(d, i + 1), *ei = AT(e, i), *ej = AT(e, i + 1), position = (double)i;
                EACH {
                    int active = position < m[v];
                    double f = s[v] * ei[v], b = c[v] * ei[v], square = f * f + g[v] * g[v], r = sqrt(square);
                    int turned = r > 0;
                    double inverse = turned ? 1 / r : 0, sine = f * inverse, cosine = turned ? g[v] * inverse : 1;
                    double base = dj[v] - p[v], t = (di[v] - base) * sine + 2 * cosine * b, next = sine * t;
                    ej[v] = active ? (position + 1 < m[v] ? r : 0) : ej[v];
                    dj[v] = active ? base + next : dj[v];
                    g[v] = active ? cosine * t - b : g[v];
                    p[v] = active ? next : p[v];
                    s[v] = active ? sine : s[v];
                    c[v] = active ? cosine : c[v];
                    turn[v] = active ? cosine : 1;
                    turn[LANES + v] = active ? sine : 0;
                }
            }
            EACH {
                int active = m[v] > first;
                dl[v] = active ? dl[v] - p[v] : dl[v];
                el[v] = active ? g[v] : el[v];
            }
        }
    }
    return count;
}


/* Rotate the vector y by all turns in order (from blocks' coordinates to eigenvectors'), or back in reverse. */
static void NAME(rotate)(int64_t count, const double *restrict turns, const int32_t *restrict where, double *restrict y,
                         int reverse) {
    for (int64_t step = 0; step < count; step++) {
        int64_t k = reverse ? count - 1 - step : step;
        const double *turn = turns + 2 * LANES * k;
        double *yi = AT(y, where[k]), *yj = AT(y, where[k] + 1), direction = reverse ? -1 : 1;
        EACH {
            double cosine = turn[v], sine = direction * turn[LANES + v], lower = yi[v], upper = yj[v];
            yj[v] = sine * lower + cosine * upper;
            yi[v] = cosine * lower - sine * upper;
        }
    }
}

/* Eigenvectors W [n, n]: the i-th column is what reflections and rotations make of the i-th unit vector. All columns
   together: one alone would wait for itself. */
static void NAME(eigenvectors)(int64_t n, const double *restrict A, const double *restrict B, int64_t count,
                               const double *restrict turns, const int32_t *restrict where, double *restrict W) {
    const int64_t ld = LEADING(n);
    for (int64_t k = 0; k < n * n; k++) {
        double *w = AT(W, k), one = k % (n + 1) == 0;
        EACH w[v] = one;
    }
    for (int64_t k = 0; k + 2 < n; k++) {
        const double *beta = AT(B, k);
        for (int64_t c = 0; c < n; c++) {
            double dot[LANES];
            EACH dot[v] = 0;
            for (int64_t i = k + 1; i < n; i++) {
                const double *x = AT(A, i * ld + k), *w = AT(W, i * n + c);
                EACH dot[v] += x[v] * w[v];
            }
            EACH dot[v] *= beta[v];
            for (int64_t i = k + 1; i < n; i++) {
                const double *x = AT(A, i * ld + k);
                double *w = AT(W, i * n + c);
                EACH w[v] -= dot[v] * x[v];
            }
        }
    }
    for (int64_t r = 0; r < count; r++) {
        const double *turn = turns + 2 * LANES * r;
        double cosine[LANES], sine[LANES];
        EACH {
            cosine[v] = turn[v];
            sine[v] = turn[LANES + v];
        }
        for (int64_t c = 0; c < n; c++) {
            double *wi = AT(W, where[r] * n + c), *wj = wi + n * LANES;
            EACH {
                double lower = wi[v], upper = wj[v];
                wj[v] = sine[v] * lower + cosine[v] * upper;
                wi[v] = cosine[v] * lower - sine[v] * upper;
            }
        }
    }
}

/* What multiplies the first moment: clip(rate / (root_scale sqrt(eigenvalue + jitter) + damping)). */
static void NAME(response)(const Task *t, const double *restrict eigenvalue, const double *restrict least,
                           double *restrict out) {
    const double jitter = t->jitter, root_scale = t->root_scale, damping = t->damping, rate = t->rate;
    const double lower = t->lower, upper = t->upper;
    EACH {
        double value = eigenvalue[v] > least[v] ? eigenvalue[v] : least[v];
        value = (value > 0 ? value : 0) + jitter;
        double below = root_scale * sqrt(value) + damping, s = rate / below;
        s = below > 0 ? s : 0;
        s = s < upper ? s : upper;
        out[v] = s > lower ? s : lower;
    }
}

/* Offsets in the parameter of the coordinates [n, LANES] of each lane; -1 where there is none. */
static void NAME(locate)(const Task *t, int64_t j, int64_t valid, int64_t *restrict offsets) {
    const int64_t n = t->n;
    if (t->index || valid < LANES)
        for (int64_t k = 0; k < n * LANES; k++) offsets[k] = -1;
    for (int64_t v = 0; v < valid; v++) {
        if (t->index) {
            for (int64_t i = 0; i < n; i++) AT(offsets, i)[v] = t->index[(j + v) * n + i];
            continue;
        }
        int64_t line = (j + v) / t->chunks, at = ((j + v) - line * t->chunks) * n;
        int64_t offset = line * t->line_stride + at * t->stride, rest = t->length - at;
        for (int64_t i = 0; i < n; i++) AT(offsets, i)[v] = i < rest ? offset + i * t->stride : -1;
    }
}

/* The step of elements that are blocks of their own: the diagonal method. */
static void NAME(flat)(const Task *t, int64_t start, int64_t stop) {
    const STORE *grad = t->grad;
    STORE *mean = t->mean, *param = t->param, *moments = t->moments;
    const double lower = t->lower, upper = t->upper;
    _Pragma("omp simd") for (int64_t i = start; i < stop; i++) {
        double old = (double)param[i], slope = t->sign * (double)grad[i];
        slope += t->coupled_decay != 0 ? t->coupled_decay * old : 0;
        STORE moment = (STORE)(t->moment_keep * (double)moments[i] + t->moment_add * slope * slope);
        moments[i] = moment;
        double first = slope;
        if (mean) {
            STORE average = (STORE)(t->mean_keep * (double)mean[i] + t->mean_add * slope);
            mean[i] = average;
            first = (double)average;
        }
        double below = t->root_scale * sqrt((double)moment) + t->damping;
        double s = below > 0 ? t->rate / below : 0;
        s = s < upper ? s : upper;
        s = s > lower ? s : lower;
        param[i] = (STORE)(t->subtract ? t->shrink * old - s * first : s * first);
    }
}

/* A row of a tile as doubles, zero where there is no block. */
static inline void NAME(load)(const STORE *row, int whole, int64_t valid, double *restrict out) {
    if (whole) {
        EACH out[v] = (double)row[v];
    } else {
        EACH out[v] = 0;
        for (int64_t v = 0; v < valid; v++) out[v] = (double)row[v];
    }
}

static void NAME(tile)(const Task *t, int64_t j, int64_t valid, double *restrict work) {
    const int64_t n = t->n, width = t->width, tile = j / width, lane = j % width;
    const int64_t ld = LEADING(n);
    const int whole = lane + LANES <= width;
    const STORE *grad = t->grad;
    STORE *mean = t->mean, *param = t->param, *moments = t->moments, *basis = t->basis, *spectrum = t->spectrum;
    double *A = work, *d = A + LANES * n * ld, *e = d + LANES * n, *B = e + LANES * n, *w = B + LANES * n;
    double *g = w + LANES * n, *y = g + LANES * n, *s = y + LANES * n, *scratch = s + LANES * n;
    STORE *slopes = (STORE *)scratch; /* gradient; mean, and both in the basis */
    int64_t *offsets = (int64_t *)(scratch + 4 * LANES * n);
    int32_t *where = (int32_t *)(offsets + LANES * n);
    double *vectors = scratch + 5 * LANES * n + n * (n - 1) * MAX_SWEEPS / 4 + LANES;
    double *turns = vectors + LANES * n * n;
    double scale[LANES], least[LANES], lost[LANES], top[LANES], broken[LANES];

    NAME(locate)(t, j, valid, offsets);
    for (int64_t i = 0; i < n; i++) {
        int64_t *offset = offsets + i * LANES;
        double *gi = AT(g, i), *yi = AT(y, i);
        for (int64_t v = 0; v < LANES; v++) {
            gi[v] = yi[v] = 0;
            if (offset[v] < 0) continue;
            double slope = t->sign * (double)grad[offset[v]];
            if (t->coupled_decay != 0) slope += t->coupled_decay * (double)param[offset[v]];
            gi[v] = slope;
            if (mean) {
                double moment = t->mean_keep * (double)mean[offset[v]] + t->mean_add * slope;
                mean[offset[v]] = (STORE)moment;
                yi[v] = (double)mean[offset[v]];
            } else {
                yi[v] = slope;
            }
        }
    }
    STORE keep = (STORE)t->moment_keep, add = (STORE)t->moment_add;
    for (int64_t i = 0; i < n; i++) {
        STORE *gs = AT(slopes, i);
        double *gi = AT(g, i);
        EACH gs[v] = (STORE)gi[v];
    }
    /* In the storage's own precision: what is kept must not depend on which process or mode keeps it. */
    for (int64_t i = 0; i < n; i++) {
        STORE gi[LANES], *gs = AT(slopes, i);
        EACH gi[v] = add * gs[v];
        for (int64_t k = 0; k <= i; k++) {
            STORE *row = ROW(moments, n * (n + 1) / 2, i * (i + 1) / 2 + k), *gk = AT(slopes, k);
            if (whole) {
                EACH row[v] = keep * row[v] + gi[v] * gk[v];
            } else {
                for (int64_t v = 0; v < valid; v++) row[v] = keep * row[v] + gi[v] * gk[v];
            }
        }
    }
    if (t->mode == ACCUMULATE) return;

    int turn_now = t->mode == SOLVE || t->mode == REFRESH ||
                   (t->mode == TRACKED && (j / 16 + t->phase) % t->interval == 0);
    EACH lost[v] = 0;
    if (t->mode == DIAGONAL || turn_now)
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = t->mode == DIAGONAL ? i : 0; k <= i; k++)
                NAME(load)(ROW(moments, n * (n + 1) / 2, i * (i + 1) / 2 + k), whole, valid, AT(A, i * ld + k));
    if (t->mode == DIAGONAL) {
        EACH top[v] = 0;
        for (int64_t i = 0; i < n; i++) {
            double *a = AT(A, i * ld + i);
            NAME(response)(t, a, top, s);
            EACH AT(y, i)[v] *= s[v];
        }
    } else if (turn_now) {
        /* A block that has overflowed must not spoil the weights: its step is zero, and it is counted. */
        EACH scale[v] = 0;
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k <= i; k++) {
                double *a = AT(A, i * ld + k);
                EACH scale[v] += fabs(a[v]);
            }
        EACH broken[v] = scale[v] <= 1e300 ? 0 : 1;
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k <= i; k++) {
                double *a = AT(A, i * ld + k);
                EACH a[v] = broken[v] > 0 ? 0 : a[v];
            }
        EACH scale[v] = 0;
        for (int64_t i = 0; i < n; i++) {
            double *a = AT(A, i * ld + i);
            EACH scale[v] = a[v] > scale[v] ? a[v] : scale[v];
        }
        EACH top[v] = scale[v] > TINY ? 1 / scale[v] : 0;
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k <= i; k++) {
                double *a = AT(A, i * ld + k);
                EACH a[v] *= top[v];
            }
        NAME(reduce)(n, A, B, d, e, w);
        int64_t count = NAME(diagonalise)(n, d, e, sizeof(STORE) == 4 ? 1e-12 : 2e-16, turns, where, lost);
        EACH lost[v] += broken[v];
        EACH top[v] = 0;
        for (int64_t i = 0; i < n; i++) {
            double *di = AT(d, i);
            EACH {
                di[v] *= scale[v];
                top[v] = di[v] > top[v] ? di[v] : top[v];
            }
        }
        EACH least[v] = t->floor * top[v];
        NAME(reflect)(n, A, B, y, 0);
        NAME(rotate)(count, turns, where, y, 0);
        for (int64_t i = 0; i < n; i++) {
            NAME(response)(t, AT(d, i), least, s);
            EACH AT(y, i)[v] = broken[v] > 0 ? 0 : AT(y, i)[v] * s[v];
        }
        NAME(rotate)(count, turns, where, y, 1);
        NAME(reflect)(n, A, B, y, 1);
        if (basis) {
            for (int64_t i = 0; i < n; i++) {
                double *di = AT(d, i);
                STORE *out = ROW(spectrum, n, i);
                for (int64_t v = 0; v < valid; v++) out[v] = (STORE)di[v];
            }
            NAME(eigenvectors)(n, A, B, count, turns, where, vectors);
            for (int64_t i = 0; i < n; i++)
                for (int64_t k = 0; k < n; k++) {
                    STORE *out = ROW(basis, n * n, i * n + k);
                    const double *from = AT(vectors, k * n + i);
                    for (int64_t v = 0; v < valid; v++) out[v] = (STORE)from[v];
                }
        }
    } else {
        /* The basis stays; its eigenvalues follow the gradient: diag(Q' V Q) obeys the recursion of V. */
        STORE *means = slopes + LANES * n, *turned = means + LANES * n, *wanted = turned + LANES * n;
        double *eigenvalue = d;
        const STORE *columns = ROW(basis, n * n, 0);
        if (!whole) {
            /* Fewer blocks than lanes: a copy in which every row is whole. */
            STORE *copy = (STORE *)A;
            for (int64_t r = 0; r < n * n; r++)
                for (int64_t v = 0; v < LANES; v++) AT(copy, r)[v] = v < valid ? columns[r * width + v] : 0;
            columns = copy;
        }
        const int64_t row = whole ? width : LANES;
        for (int64_t k = 0; k < n; k++) {
            STORE *mk = AT(means, k);
            double *yk = AT(y, k);
            EACH mk[v] = (STORE)yk[v];
        }
        for (int64_t k = 0; k < n; k++) {
            STORE slope[LANES], mean_part[LANES], *a = AT(turned, k), *b = AT(wanted, k);
            EACH slope[v] = mean_part[v] = 0;
            for (int64_t i = 0; i < n; i++) {
                const STORE *q = columns + (i * n + k) * row, *gi = AT(slopes, i), *mi = AT(means, i);
                EACH {
                    slope[v] += q[v] * gi[v];
                    mean_part[v] += q[v] * mi[v];
                }
            }
            EACH {
                a[v] = slope[v];
                b[v] = mean_part[v];
            }
        }
        EACH top[v] = 0;
        for (int64_t k = 0; k < n; k++) {
            STORE *value = ROW(spectrum, n, k), *a = AT(turned, k);
            double *ev = AT(eigenvalue, k);
            if (whole) {
                EACH {
                    value[v] = keep * value[v] + add * a[v] * a[v];
                    ev[v] = (double)value[v];
                }
            } else {
                EACH ev[v] = 0;
                for (int64_t v = 0; v < valid; v++) {
                    value[v] = keep * value[v] + add * a[v] * a[v];
                    ev[v] = (double)value[v];
                }
            }
            EACH top[v] = ev[v] > top[v] ? ev[v] : top[v];
        }
        EACH least[v] = t->floor * top[v];
        for (int64_t k = 0; k < n; k++) {
            NAME(response)(t, AT(eigenvalue, k), least, s);
            STORE *b = AT(wanted, k);
            EACH b[v] = (STORE)((double)b[v] * s[v]);
        }
        for (int64_t i = 0; i < n; i++) {
            double *yi = AT(y, i);
            STORE sum[LANES];
            EACH sum[v] = 0;
            for (int64_t k = 0; k < n; k++) {
                const STORE *q = columns + (i * n + k) * row, *b = AT(wanted, k);
                EACH sum[v] += q[v] * b[v];
            }
            EACH yi[v] = (double)sum[v];
        }
    }
    int64_t bad = 0;
    for (int64_t v = 0; v < valid; v++) bad += lost[v] != 0;
    if (bad) __atomic_fetch_add(t->failed, bad, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < n; i++) {
        int64_t *offset = offsets + i * LANES;
        double *yi = AT(y, i);
        for (int64_t v = 0; v < LANES; v++) {
            if (offset[v] < 0) continue;
            if (t->subtract)
                param[offset[v]] = (STORE)(t->shrink * (double)param[offset[v]] - yi[v]);
            else
                param[offset[v]] = (STORE)yi[v];
        }
    }
}

#undef AT
#undef ROW
#undef EACH
#endif
