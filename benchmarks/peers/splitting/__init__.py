"""Full-batch methods that split a ReLU network into layers: reference implementations, to compare with.

    name          what is split off                duals            source of the updates
    dladmm        z_l, a_l                         last layer       Wang et al. 2019, paper and code
    pdadmm        p_l (input), z_l, q_l (output)   every interface  Wang et al. 2020, paper and code
    bcd           U_l (before ReLU), V_l (behind)  none             Zeng et al. 2019, code
    taylor_admm   z_l, a_l                         last layer       Taylor et al. 2016, from two independent codes
    mac           a_l                              none             Carreira-Perpinan and Wang 2014, by definition

All have rows for samples: z_l = a_{l-1} W_l' + b_l, a_l = relu(z_l), a_0 the inputs, z_L the logits. Each file has one
function `steps`, a generator that yields the layers [(W, b), ...] after every iteration over the whole training set.
"""
